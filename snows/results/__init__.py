"""What the verbs leave behind: reports, pages, run folders, and files for other programs."""
