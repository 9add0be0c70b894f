"""The stages of a dump, which work at the same time: reading features, batching, scoring, committing."""
