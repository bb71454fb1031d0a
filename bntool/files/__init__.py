"""What a file is, safe loading, atomic saving, side files and model references."""
