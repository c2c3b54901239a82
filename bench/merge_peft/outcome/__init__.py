"""What a run has measured: its journal, and the labels and features made of it."""
