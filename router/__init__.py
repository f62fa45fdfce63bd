"""Who answers (decide/), how (answer/), and over HTTP (http/, app.py). No Ray."""
