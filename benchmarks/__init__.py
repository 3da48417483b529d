"""Scripts that measure, and that generate tables for the documentation."""
