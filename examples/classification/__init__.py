"""What the classification examples share: arguments, data, model, and a run from arguments to metrics."""
