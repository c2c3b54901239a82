"""Public data sets as items: files of one's own, or fetched where that is asked for."""
