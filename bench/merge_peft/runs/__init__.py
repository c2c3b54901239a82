"""Runs: planned, done by several processes, stopped and resumed, and made again."""
