"""Training an IP-Adapter: pairs, features, their order, the step, the folder of the run."""
