"""Runs: start, folder, plan, optimizer, checkpoints, loop, records; knows neither models nor images."""
