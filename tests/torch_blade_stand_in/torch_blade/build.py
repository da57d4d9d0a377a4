"""What was built in; the tests append to a copy to have another build."""

pipelines = ["DISC"]
options = ["enable_fp16", "enable_static_shape", "disable_optimization_for_inference"]
