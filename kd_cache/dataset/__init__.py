"""Who may be used, and what a net is given."""
