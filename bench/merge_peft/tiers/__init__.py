"""What a run trains, merges and measures, declared; nothing is done here."""
