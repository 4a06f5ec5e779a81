// Clang's thread safety analysis (-Wthread-safety), which checks that data is accessed with its lock held. C++
// attribute syntax cannot name a parameter or follow a declarator, hence macros, with the names of Clang's
// documentation.
#pragma once

/// A lock class; a class that holds a lock for a scope.
#define CAPABILITY(name) __attribute__((capability(name)))
#define SCOPED_CAPABILITY __attribute__((scoped_lockable))

/// Data that is accessed only with the lock held.
#define GUARDED_BY(lock) __attribute__((guarded_by(lock)))

/// A function that must be called with the lock held; that acquires it; that releases it; that must be called without
/// it, since it acquires the lock itself.
#define REQUIRES(...) __attribute__((requires_capability(__VA_ARGS__)))
#define ACQUIRE(...) __attribute__((acquire_capability(__VA_ARGS__)))
#define RELEASE(...) __attribute__((release_capability(__VA_ARGS__)))
#define EXCLUDES(...) __attribute__((locks_excluded(__VA_ARGS__)))

/// A function that the analysis cannot follow; its comment must justify it.
#define NO_THREAD_SAFETY_ANALYSIS __attribute__((no_thread_safety_analysis))
