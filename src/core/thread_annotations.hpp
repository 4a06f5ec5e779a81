// Clang's thread safety analysis (-Wthread-safety): which lock protects what. Attributes of the language's own syntax
// cannot name a parameter or stand after a declarator, hence macros, with the names of Clang's documentation.
#pragma once

/// A class that is a lock; a class that holds one for a scope.
#define CAPABILITY(name) __attribute__((capability(name)))
#define SCOPED_CAPABILITY __attribute__((scoped_lockable))

/// Data that is read and written with the lock held only.
#define GUARDED_BY(lock) __attribute__((guarded_by(lock)))

/// A function that is called with the lock held; one that takes it and returns with it held; one that gives it back;
/// one that must not be called with it held, since it takes it itself.
#define REQUIRES(...) __attribute__((requires_capability(__VA_ARGS__)))
#define ACQUIRE(...) __attribute__((acquire_capability(__VA_ARGS__)))
#define RELEASE(...) __attribute__((release_capability(__VA_ARGS__)))
#define EXCLUDES(...) __attribute__((locks_excluded(__VA_ARGS__)))

/// A function that the analysis cannot follow; its comment says why it is right.
#define NO_THREAD_SAFETY_ANALYSIS __attribute__((no_thread_safety_analysis))
