{
  # Built against an installed memferry: its C++ core's headers, and those of its sources that the VMM uses.
  'variables': {
    'memferry%': '<!(node -p "require(\'path\').relative(\'.\', require(\'path\').dirname(require.resolve(\'memferry/package.json\')))")',
  },
  'targets': [
    {
      'target_name': 'kvm_example',
      'sources': ['vmm/addon.cc', 'vmm/vm.cc', 'vmm/vcpu_state.cc', 'vmm/guest.S', '<(memferry)/native/os/mapping.cc'],
      'include_dirs': ['<(memferry)/native', 'vmm'],
      'defines': ['NAPI_VERSION=8', 'NAPI_CPP_EXCEPTIONS'],
      'cflags_cc': [
        '-std=c++20', '-fexceptions', '-fvisibility=hidden', '-Wall', '-Wextra', '-Wshadow', '-Wconversion',
        '-isystem', '<!(node -p "require(\'path\').resolve(require(\'node-addon-api\').include_dir)")',
      ],
      'cflags_cc!': ['-fno-exceptions', '-std=gnu++17', '-std=gnu++20', '-Wno-unused-parameter'],
    },
  ],
}
