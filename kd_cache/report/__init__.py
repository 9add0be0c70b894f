"""One self-contained HTML page of a cache, of a training, of a comparison; and its figures as JSON beside it."""
