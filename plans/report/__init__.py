"""`svdit-plan report`: what a plan keeps, loses and costs, as one HTML page."""
