"""What is kept of many adapters when only a few may be resident: plans against fixed operators."""
