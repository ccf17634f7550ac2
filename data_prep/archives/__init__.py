"""Archives read in place: members by offset, never extracted by name."""
