"""Controllers for anybody's training loop: numbers in, one number out, state as JSON. No Ray here."""
