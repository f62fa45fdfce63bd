"""What is measured while training: the Step record."""
