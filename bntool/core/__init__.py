"""What everything else speaks in: options and what a kind of model can do of them. No torch here."""
