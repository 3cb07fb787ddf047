"""What several test files use: where things lie, oracles, and programs driven as a person would."""
