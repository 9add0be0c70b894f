"""To and from other tools: export, adopt."""
