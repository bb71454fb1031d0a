"""What stands between a stranger's file and code that runs: archives, pickles, programs, scripts."""
