"""Who may be used, and what a net is given: the task, the manifest, the guard, the features."""
