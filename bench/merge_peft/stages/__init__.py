"""What a run does, each by itself: train, calibrate, evaluate, route."""
