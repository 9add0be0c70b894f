"""What is behind `LogitCache`: opening a generation, resolving files, gathering rows, serving batches."""
