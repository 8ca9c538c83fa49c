"""Many pictures."""
