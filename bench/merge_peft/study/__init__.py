"""How far what merging costs can be foretold, of labels and features."""
