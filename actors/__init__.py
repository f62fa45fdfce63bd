"""Mailboxes: the constellation as Ray actors."""
