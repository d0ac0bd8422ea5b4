"""Many runs from one command: points, who does which, tuning and fair comparison."""
