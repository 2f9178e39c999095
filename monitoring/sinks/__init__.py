"""A run's steps, goodput and incidents, told to other tools: TensorBoard, MLflow, Weights & Biases.

Each sink follows the files of the run directory on a thread of its own in the driver, far from the step. What a sink
does, or fails to do, never changes the run.
"""
