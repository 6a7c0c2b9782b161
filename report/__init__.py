"""What a run or an experiment left behind: tables, pictures, traces."""
