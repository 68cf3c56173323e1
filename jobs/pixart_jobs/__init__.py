"""Where platform and models meet: one file a job, in pipeline order."""
