"""What users get wrong, one table a format; and that every loader refuses what it cannot read."""
