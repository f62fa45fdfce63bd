"""What is measured while training: the Step record, and the probes that add to it."""
