"""Parts of a dump as tasks of a Ray cluster: a task is a part, packs are the only state, and the driver retries."""
