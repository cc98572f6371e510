"""Reports of a run: console lines, metrics files, loss plot, sample texts, memory health, stragglers."""
