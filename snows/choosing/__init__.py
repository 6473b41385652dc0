"""What is asked, decided before anything is fitted: goals, budgets, the plan; and the stopwatch."""
