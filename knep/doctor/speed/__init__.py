"""Why a run is slow: where the time of a step goes, and what makes it shorter, proved by paired timing."""
