"""Fisher-Rao geometry of distributions (simplex, sphere) and the E8 root system."""
