"""What a run will need, before anything is read or rented: memory by rank, time by kind. No weights and no GPU."""
