"""Files that are whole or absent, one writer per folder, arrays named by their content."""
