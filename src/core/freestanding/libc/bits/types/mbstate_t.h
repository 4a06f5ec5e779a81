#pragma once
// libc++ names the type in stream positions; nothing here reads one.
typedef struct {
    int state;
} mbstate_t;
