"""Everything about checkpoint files."""
