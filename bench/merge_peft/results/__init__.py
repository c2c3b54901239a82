"""The results page of several runs, with its pictures."""
