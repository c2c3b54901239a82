"""One file per command: its arguments and what it does; :mod:`mergeprobe_fast.cli` calls them."""
