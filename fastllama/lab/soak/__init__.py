"""Load: thousands of short generations, whose memory must stay flat and whose texts must stay the same."""
