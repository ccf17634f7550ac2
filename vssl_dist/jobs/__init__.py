"""Jobs: what a machine is asked for, what runs there, and how it is stopped and watched."""
