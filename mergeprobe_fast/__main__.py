"""``python -m mergeprobe_fast``."""

from mergeprobe_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
