"""The drawing service: Ray Serve, HTTP and the step-level drawing engine."""
