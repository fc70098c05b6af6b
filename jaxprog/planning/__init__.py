"""What a run will need, on this hardware or on some that is not here."""
